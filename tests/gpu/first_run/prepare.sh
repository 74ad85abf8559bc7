#!/usr/bin/env bash
# On a machine that reaches a package registry: the wheels that a GPU machine with Python 3.12, torch and triton lacks.
# They land in build/first-run/wheels, about 10 MB, which git ignores: carry that folder along.
set -euo pipefail
cd "$(dirname "$0")/../../.."
wheels=build/first-run/wheels
rm -rf "$wheels"
mkdir -p "$wheels"
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' 31 28 27 17; printf -- '--platform manylinux2014_x86_64 --platform manylinux1_x86_64')
# shellcheck disable=SC2086
python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  $platforms -d "$wheels" \
  fastapi==0.165.0 starlette==1.10.0 opentelemetry-api==1.45.2 pydantic==2.14.4 pydantic_core==2.50.5 annotated-types==0.7.0 \
  typing_extensions==4.16.0 typing-inspection==0.4.5 annotated-doc==0.0.7 uvicorn==0.54.0 httptools==0.9.0 msgspec==0.22.0 \
  llguidance==1.9.1 gguf==0.19.0 openai==3.57.0 jiter==0.19.0 sniffio==1.3.1 httpx2==2.16.2 httpcore2==2.16.2 truststore==0.10.5 \
  h11==0.16.0 idna==3.20 anyio==4.16.0
ls -1 "$wheels"
du -sh "$wheels"
