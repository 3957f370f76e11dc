"""Runs a compiler's command line and fails where it tells that a kernel's matrix instructions wait for one another.

ptxas says so of Hopper's wgmma in a remark (C7510), not in a warning that a flag could make an error.
"""

import subprocess
import sys


def main() -> int:
    done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stdout.write(done.stdout)
    if done.returncode == 0 and "C7510" in done.stdout:
        print("error: C7510, Hopper's matrix instructions are serialised (is NDEBUG defined?)")
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
