"""Push a run folder to a Hub that fails at each request in turn; run by test_hub.py in a process of its own.

    python tests/push_failures.py <run folder> <how it fails>...

Prints a line of JSON for each push: how the Hub failed, at which request, and what push_model said.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

# 500 and 403 fail at every request, these at some
STEPS: dict[int | str, int] = {401: 4, 404: 4, "close": 2, "silence": 4}


def noted(folder: Path) -> Any:
    """run.json of the folder."""
    return json.loads((folder / "run.json").read_text())


def main() -> None:
    from hub_server import local_hub

    whole = Path(sys.argv[1])
    with local_hub() as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                       "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                       "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1",
                       "HF_HOME": str(whole.parent / "home")}  # fmt: skip
        from huggingface_hub import file_download

        from rlhf.errors import InputError
        from rlhf.hub import PushRequest, push_model, pushing

        time.sleep = lambda _seconds: None  # the client waits between its attempts
        pushing.TIMEOUT = 0.5
        file_download._ETAG_RETRY_TIMEOUT = 1
        request = PushRequest("you/x", "hf_secret", None, "trial")
        folder = whole.parent / "pushed"
        for how in (int(word) if word.isdigit() else word for word in sys.argv[2:]):
            number = 1 - STEPS.get(how, 1)
            said: str | None = ""
            while said is not None:
                number += STEPS.get(how, 1)
                hub.repos.clear(), hub.commits.clear(), hub.uploads.clear()
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(whole.parent / "home", ignore_errors=True)
                shutil.copytree(whole, folder)
                hub.requests, hub.failing = 0, (number, how)
                try:
                    push_model(str(folder), request)
                    said = None
                except InputError as error:
                    said = str(error)
                entry: dict[str, Any] = {"how": how, "request": number, "said": said, "noted": "hub" in noted(folder)}
                if how == 500:
                    hub.failing = None
                    push_model(str(folder), request)  # the same command, once the Hub is well again
                    entry |= {"files": sorted(hub.repos["models/you/x@trial"]), "hub": noted(folder).get("hub")}
                print("PUSH " + json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
