"""`vlmgraft lab report`: a report with every section, made on the lab from the merge to the knock-outs."""
