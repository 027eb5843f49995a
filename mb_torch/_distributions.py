"""Which installed distributions own our import names.

Two distributions can both ship a package called `modelbatch`; pip then lets the later one overwrite the files
of the earlier one and says nothing. The compatibility packages therefore ask here, before anything else, who
else is there.
"""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "modelbatch-hybrid"


def refuse_second_owner(package: str) -> None:
    """Raise when the distribution that is also called `package` is installed beside this one.

    Only that one name is looked up, in any spelling that pip treats as the same: one directory listing.

    Args:
        package: A top-level import name that this distribution shares with another one.

    Raises:
        ImportError: The other distribution is installed; the message has the commands that leave only ours.

    Example:
        >>> refuse_second_owner("a-name-that-nobody-installed")
    """
    try:
        other = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return
    name, version = other.metadata["Name"], other.version
    raise ImportError(
        f"two installed distributions own the package {package!r}: {DISTRIBUTION} and {name} {version}, "
        f"so files of one may have overwritten files of the other. Keep {DISTRIBUTION}, "
        f"which offers the same names: `pip uninstall {name}`, then "
        f"`pip install --force-reinstall --no-deps {DISTRIBUTION}`.",
        name=package,
    )
