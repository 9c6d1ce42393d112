# For scripts that are called with FOLDER and DATA, to be sourced: checks and sets folder, data and python, and goes to
# the project's root.
if (($# != 2)); then
    echo "usage: bench/$(basename "$0") FOLDER DATA" >&2
    exit 2
fi
mkdir -p "$1"
# shellcheck disable=SC2034
folder=$(realpath "$1") data=$(realpath -e "$2")
cd "$(dirname "$0")/.."
# shellcheck disable=SC2034
python=${PYTHON:-python3}
