"""From requests to steps: scheduler, policies, KV blocks, runner and sampler. Knows no HTTP."""
