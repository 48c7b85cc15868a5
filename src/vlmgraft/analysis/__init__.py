"""What carries what, and is merging safe: distances, spectra, knock-outs, bands of directions, sweeps."""
