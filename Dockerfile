# For CPUs as it is, for NVIDIA GPUs with --build-arg CUDA=1, for Ray clusters with --build-arg RAY=1.
# EXTRA_INDEX_URL: a further package index. The default one's torch for x86-64 always carries CUDA's libraries, gigabytes
# of them; an index of CPU-only wheels spares them.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS build
ARG EXTRA_INDEX_URL=""
ARG CUDA=""
ARG RAY=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/requirements.txt \
    PIP_EXTRA_INDEX_URL=${EXTRA_INDEX_URL}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY deploy/docker/requirements.txt /requirements.txt
RUN python -m venv --without-pip /opt/dsc-serve && pip --python /opt/dsc-serve install --requirement /requirements.txt
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY kernels ./kernels
COPY dsc_serve ./dsc_serve
# hadolint ignore=DL3013
RUN extras="${CUDA:+gpu,}${RAY:+ray,}" && pip --python /opt/dsc-serve install ".${extras:+[${extras%,}]}" && \
    if [ "$(uname -m)" = x86_64 ]; then /opt/dsc-serve/bin/python -c 'import torch, dsc_kernels._native'; fi
# Triton compiles one C module at its first use; the last stage has no compiler, so here. It links against an empty
# libcuda, with which it cannot be loaded, so the command fails; the module must be there all the same.
RUN mkdir /opt/triton && if [ -n "${CUDA}" ]; then \
        gcc -shared -x c /dev/null -Wl,-soname,libcuda.so.1 -o /tmp/libcuda.so.1 && \
        { TRITON_CACHE_DIR=/opt/triton TRITON_LIBCUDA_PATH=/tmp LD_LIBRARY_PATH=/tmp /opt/dsc-serve/bin/python -c \
            'from triton.backends.nvidia.driver import CudaUtils; CudaUtils()' || ls /opt/triton/*/cuda_utils*.so; }; \
    fi

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}
RUN groupadd --system --gid 10001 dsc && \
    useradd --system --uid 10001 --gid dsc --no-create-home --home-dir /tmp --shell /usr/sbin/nologin dsc && \
    install --directory --owner dsc --group dsc /models
COPY --from=build /opt/dsc-serve /opt/dsc-serve
COPY --from=build --chown=dsc:dsc /opt/triton /var/cache/triton
ENV PATH=/opt/dsc-serve/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TRITON_CACHE_DIR=/var/cache/triton DSC_SERVE__HOST=0.0.0.0 DSC_SERVE__PORT=8000
USER 10001:10001
EXPOSE 8000
# Ready, not live: what waits for a healthy container, or sends it traffic, asks whether it answers.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["python", "-c", "\
import http.client, os, sys; \
server = http.client.HTTPConnection('127.0.0.1', os.environ['DSC_SERVE__PORT'], timeout=4); \
server.request('GET', '/health/ready'); \
sys.exit(server.getresponse().status != 200)"]
ENTRYPOINT ["dsc-serve"]
CMD ["serve"]
