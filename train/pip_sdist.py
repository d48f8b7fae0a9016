"""Download one file of a package as pip would, by the user's own settings of pip, and build nothing.

Run by ``train.downloads``: ``python -P pip_sdist.py [PIP OPTIONS] PACKAGE==VERSION FILE FOLDER``. pip has no command for
this: ``pip download`` of an sdist runs its build backend for metadata that nobody asked for. So a few classes of pip are
used here that it does not promise to keep; where one is gone, the file can still be fetched by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pip._internal.commands.download import DownloadCommand


class FileCommand(DownloadCommand):
    """``pip download``, up to where it has found the file."""

    def run(self, options: Any, args: list[str]) -> int:
        """Find it among all that the indexes and links offer, and write it as it comes."""
        requirement, file, folder = args
        package, version = requirement.split("==")
        session = self.get_default_session(options)
        finder = self._build_package_finder(options, session, ignore_requires_python=True)
        links = [one.link for one in finder.find_all_candidates(package) if one.link.filename == file]
        if not links:
            print(f"No matching distribution found for {package}=={version} as {file}", file=sys.stderr)
            return 1
        with session.get(links[0].url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True) as answer:
            answer.raise_for_status()
            with Path(folder, file).open("wb") as stream:
                for part in answer.iter_content(1 << 20):
                    stream.write(part)
        return 0


if __name__ == "__main__":
    sys.exit(FileCommand("download", "Download one file.").main(sys.argv[1:]))
