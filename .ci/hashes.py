"""pip's report of an installation -> a line of requirements with its SHA-256 for each file.

python .ci/hashes.py REPORT.json > requirements.sha256
"""

import json
import re
import sys
from pathlib import Path


def main(report: Path) -> None:
    lines = []
    for one in json.loads(report.read_text(encoding="utf-8"))["install"]:
        name = re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower()
        digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={one['metadata']['version']} --hash=sha256:{digest}")
    print("# The files that requirements.lock stands for; written by `make hashes`.")
    print("\n".join(sorted(lines)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
