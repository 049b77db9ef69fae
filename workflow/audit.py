"""Ask pip-audit whether a pinned package has a known vulnerability: ``python -m workflow.audit pip-audit``.

Exits with 1 if one has, with 2 if that could not be found out. pip-audit alone calls packages sound that its database
did not answer for.
"""

import json
import subprocess
import sys


def judge(report: dict) -> tuple[int, str]:
    """Return the exit code and what to say of pip-audit's JSON."""
    packages = report["dependencies"]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in {' or '.join(flaw['fix_versions']) or 'none'}"
        for package in packages
        for flaw in package.get("vulns", [])
    ]
    if found:
        return 1, "\n".join([*found, "Raise these in requirements.txt, then run make test and make constraints."])
    if unknown:
        return 2, (
            f"{len(unknown)} of {len(packages)} packages could not be audited ({unknown[0]} first): the vulnerability "
            "data is not reachable from here."
        )
    return 0, f"None of {len(packages)} packages has a known vulnerability."


def main(program: str) -> int:
    quiet = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
    done = subprocess.run([program, "-r", "constraints.txt", *quiet], capture_output=True, text=True)
    try:
        code, said = judge(json.loads(done.stdout))
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        code, said = 2, f"Nothing was audited: the vulnerability data is not reachable from here ({last[:160]})."
    print(said, file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
