# shellcheck shell=bash
# What the launch scripts share: they source it.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# Ends the script as a mistake on the command line does.
fail() {
    echo "$0: error: $*" >&2
    exit 2
}

# Reads $2...: --NAME=VALUE, or --NAME for "yes", goes to the variable NAME, dashes as underscores, for each name in the
# list $1; words after "--" go to the array `train`, other words before it to the array `others`.
read_options() {
    local known=" $1 " key value
    shift
    train=() others=()
    while (($#)) && [ "$1" != -- ]; do
        [ "$1" != --help ] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit; }
        key=${1%%=*}
        key=${key#--}
        value=yes
        [[ $1 != *=* ]] || value=${1#*=}
        if [[ $1 == --* && $known == *" $key "* ]]; then
            printf -v "${key//-/_}" %s "$value"
        else
            others+=("$1")
        fi
        shift
    done
    train=("${@:2}")
    [ ${#train[@]} -gt 0 ] || fail "nothing to train: end with -- --config=FILE --workdir=DIR"
}

# Ends the script unless each of the options $2... is an integer of at least $1, which is 0 or 1.
require_integers() {
    local name
    for name in "${@:2}"; do
        # Bash would take a word for the name of a variable, and 08 for an octal number.
        if ! [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((${!name} < $1)); then
            fail "--$name=${!name} must be an integer of at least $1"
        fi
    done
}

# The words as a shell reads them back.
quote() {
    local text
    printf -v text '%q ' "$@"
    echo "${text% }"
}

# Runs a command; with --dry-run only prints it.
run() {
    if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi
}

# Runs the command $2... with the text $1 to read; with --dry-run only prints both.
feed() {
    local text=$1
    shift
    if [ -n "$dry_run" ]; then
        printf "%s <<'END'\n%s\nEND\n" "$(quote "$@")" "$text"
    else
        "$@" <<<"$text"
    fi
}
