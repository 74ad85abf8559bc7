#!/usr/bin/env bash
# What a server does under load, as its clients see it: `bash examples/load_test.sh [URL] [REQUESTS]`.
set -euo pipefail
url=${1:-http://127.0.0.1:8000}
requests=${2:-64}

# A closed loop: 8 streams, each sends its next request when its last has ended.
dsc-serve bench serve "$url" --concurrency 8 --requests "$requests" --prompt-tokens 48 --output-tokens 16

# Open arrivals: 10 requests a second on average, whatever the server does, and how many of them keep two limits.
dsc-serve bench serve "$url" --arrivals poisson --request-rate 10 --requests "$requests" \
  --prompt-tokens lognormal:48:0.5 --output-tokens 16 --goodput ttft:200 --goodput tpot:50
