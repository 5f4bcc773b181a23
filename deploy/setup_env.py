"""Makes the virtual environment that the server and the tests run in: `python3 deploy/setup_env.py --help`.

This file must parse under any Python, to say which one is needed; the work is in the package beside it.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        "hunyuan-vllm needs Python 3.11 or newer, and this is Python %d.%d: install one, or name it with PYTHON="
        % sys.version_info[:2]
    )

from bootstrap.main import main

if __name__ == "__main__":
    sys.exit(main())
