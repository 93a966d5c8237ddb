#!/usr/bin/env bash
# RLlib pins a Gymnasium of its own, so it gets an environment of its own: .venv-rllib, made here
# (some 6 GB, PyTorch comes with its CUDA libraries) and reused afterwards. Then runs
#
#   docs/examples/rllib_env.sh              rllib_ppo.py; further arguments go to it
#   docs/examples/rllib_env.sh test         the test of RLlib alone
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=.venv-rllib
if [ ! -e "$venv/ready" ]; then
    test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet --no-compile --editable . 'ray[rllib]>=2.60,<3' pytest
    touch "$venv/ready"
fi
"$venv/bin/pip" list 2>/dev/null | grep -E '^(gymnasium|ray|torch) '

export RAY_USAGE_STATS_ENABLED=0 # Ray reports its use to its makers unless told not to
if [ "${1:-}" = test ]; then
    "$venv/bin/python" -c 'import ray.rllib.algorithms.ppo' # without it the test would be skipped
    exec "$venv/bin/python" -m pytest tests/test_examples.py -k rllib
fi
exec "$venv/bin/python" docs/examples/rllib_ppo.py "$@"
