"""`python -m infra.local.alone COMMAND…`: become COMMAND, once no child of a killed predecessor is left.

A server that is killed may leave children that hold its port; its successor would fail on them for ever.
"""

from __future__ import annotations

import os
import sys

from infra.local.supervisor import STACK_MARK, kill_group


def main() -> None:
    kill_group(os.environ[STACK_MARK], os.environ["SUPERVISOR_GROUP_NAME"])
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
