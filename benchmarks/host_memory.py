"""Peak anonymous memory of a process: what is not page cache of mapped files."""

import threading
import time
from pathlib import Path


class HostMemory:
    """Watches this process while open; `peak` is in bytes, and `before` what it held at first."""

    def __enter__(self):
        self.before = self.peak = self._anonymous()
        self._open = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    @staticmethod
    def _anonymous():
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(fields["RssAnon"].split()[0])

    def _watch(self):
        while self._open:
            self.peak = max(self.peak, self._anonymous())
            time.sleep(0.02)

    def __exit__(self, *_):
        self._open = False
        self._thread.join()
