"""What a stage sees of its phase, without ledger and log: for tests that run one stage of phase 1 alone."""
import orjson
from yunmin_efficientdata.core.executor import make_executor
from yunmin_efficientdata.core.settings import load_settings

class Stage:
    def __init__(self, parts=None): self.parts = parts or {}
    def done_part(self, p): return p in self.parts
    def mark_part(self, p, info=None): self.parts[p] = orjson.loads(orjson.dumps(info, option=orjson.OPT_NON_STR_KEYS))

class Ctx:
    def __init__(self, store, *overrides, workers=1):
        self.store, self.settings, self.executor = store, load_settings("configs/demo", list(overrides)), make_executor(workers=workers)
