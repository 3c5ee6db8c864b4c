#!/usr/bin/env bash
# Debian packages that a part of the project's own tests and checks needs: installs those of its arguments that are
# missing. As another user than root it says which command does it. Training, serving and the run page need none.
#
#   scripts/system_packages.sh chromium
set -euo pipefail

missing=()
for package in "$@"; do
    [[ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" == installed ]] || missing+=("$package")
done
[[ ${#missing[@]} -gt 0 ]] || exit 0

command="apt-get install --yes --no-install-recommends ${missing[*]}"
if ! command -v apt-get >/dev/null; then
    printf 'system_packages: %s not found, and there is no apt-get here: install them your own way\n' "${missing[*]}" >&2
    exit 1
fi
if [[ "$(id -u)" != 0 ]]; then
    printf 'system_packages: run this once: sudo %s\n' "$command" >&2
    exit 1
fi
printf 'system_packages: installing %s\n' "${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
$command -qq >/dev/null
