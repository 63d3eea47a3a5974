#!/usr/bin/env bash
# Architectures on equal terms: data, trials, report.html. Run the same line again to go on. README.md says more.
#   examples/compare/run.sh [--size tiny --seeds 3 --archs ... --budget-minutes 110] [--smoke]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec python tools/compare.py --save "${SAVE:-runs/compare}" "$@"
