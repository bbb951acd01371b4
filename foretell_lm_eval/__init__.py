"""Makes `lm_eval --model foretell` find foretell. lm-evaluation-harness asks no installed package for models; torch,
which it imports, calls those of the entry point group torch.backends at the end of its own import, us among them.

A package of its own, which needs no foretell: whatever foretell a process imports, or none, torch can be imported.
"""

import contextlib
import sys


def announce() -> None:
    """Register the name where the harness is being imported; the class is imported when somebody asks for it."""
    if "lm_eval" in sys.modules:
        with contextlib.suppress(ImportError):  # another harness: it says that there is no such model
            import lm_eval.models  # noqa: F401  its own names first: it reads them only while it has none
            from lm_eval.api.registry import model_registry

            model_registry.register("foretell", target="foretell.evaluation.harness:ForetellLM")
