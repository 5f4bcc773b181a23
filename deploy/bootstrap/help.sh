# shellcheck shell=sh
# Read by the scripts: --help shows the head of the script where no environment is there whose command could
# say more. The script sets `root`, and `docstring` to the Python file that explains its settings, if there is one.
for word do
    case $word in
        -h | --help)
            [ -z "${standalone:-}" ] && [ -x "${HUNYUAN_VENV:-$root/.venv}/bin/hunyuan-vllm" ] && break
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
            [ -z "${docstring:-}" ] || sed -n '/^    """/,/^    """$/{/"""/d;/^ *\\b$/d;s/^    //;p;}' "$root/$docstring"
            [ -n "${standalone:-}" ] || printf '\nAll flags: the same again, after sh deploy/setup_env.sh\n'
            exit 0
            ;;
    esac
done
