# syntax=docker/dockerfile:1
# CPU image by default. For an index with CPU-only (or CUDA) wheels of torch:
#   docker build --build-arg EXTRA_INDEX_URL=… .      and, for a GPU, --build-arg EXTRAS='[gpu]'
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS build
ARG EXTRA_INDEX_URL=""
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_EXTRA_INDEX_URL=${EXTRA_INDEX_URL}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/dsc-serve
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY kernels ./kernels
COPY dsc_serve ./dsc_serve
RUN /opt/dsc-serve/bin/pip install ".${EXTRAS}"

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin dsc
COPY --from=build /opt/dsc-serve /opt/dsc-serve
ENV PATH=/opt/dsc-serve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["dsc-serve"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
