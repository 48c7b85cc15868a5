# docker build -t vlmgraft . && docker run --gpus all -v "$PWD":/work vlmgraft merge recipe.yaml --out merged --dry-run
FROM python:3.12-slim
COPY pyproject.toml README.md LICENSE NOTICE /src/
COPY src /src/src
RUN pip install --no-cache-dir /src
WORKDIR /work
ENTRYPOINT ["vlmgraft"]
