#!/usr/bin/env bash
# Tests the stack on a container engine: the one that runs on this machine, else one that it starts, and stops again.
# Exit code 77: no engine can be had here, so nothing was tested; the last line says why.
set -uo pipefail
cd "$(dirname "$0")/../.."

# For machines without an engine or without a registry: start-engine.sh, stop-engine.sh, and base-images.sh, which makes
# images under the names that are needed.
scripts=${ENGINE_SCRIPTS:-../shared/containers}
images=(python:3.12-slim redis:7-alpine)
started=
log=$(mktemp)

finish() {
  [ -z "$started" ] || "$scripts/stop-engine.sh"
  rm -f "$log"
}
trap finish EXIT

not_run() {
  tail -5 "$log"
  printf '\ncompose-test was not run: %s\n' "$1"
  exit 77
}

script() { # name: what it says goes to the log
  [ -x "$scripts/$1" ] && "$scripts/$1" >"$log" 2>&1
}

if ! docker info >/dev/null 2>&1; then
  [ -x "$scripts/start-engine.sh" ] || not_run "no container engine runs here (docker info fails)"
  echo "No container engine runs: starting one by $scripts/start-engine.sh"
  started=yes
  script start-engine.sh || not_run "the container engine did not start"
fi
docker compose version >"$log" 2>&1 || not_run "the engine has no compose plugin"
for image in "${images[@]}"; do
  docker image inspect "$image" >/dev/null 2>&1 || docker pull --quiet "$image" >"$log" 2>&1 && continue
  echo "$image cannot be pulled: making a stand-in by $scripts/base-images.sh"
  script base-images.sh && docker image inspect "$image" >/dev/null 2>&1 || not_run "$image cannot be had"
done

.venv/bin/python -m pytest tests/compose "$@"
