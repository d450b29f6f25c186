"""The laws that cheap convolutions and rewritten models must obey, for this package's and for anyone else's.

`check_op(MyConv2d)` runs every law of ops on a handful of generated convolutions and raises an
`AssertionError` of one sentence at the first that is broken. With hypothesis, in a test suite::

    @pytest.mark.parametrize("law", laws().values(), ids=laws())
    @given(case=cases(MyConv2d))
    def test_laws(law, case):
        law(MyConv2d, *case)

A law of ops is a function whose name starts with `law_`. It takes the op's class, the geometry of
the convolution to replace (the donor), and options; it draws its weights and images from a seed of
its own and leaves the global random state alone.

`check_model(my_model, "shift", example_inputs=x)` rewrites a whole model and runs every law of whole
models on what comes of it, in the same way. With hypothesis::

    @pytest.mark.parametrize("law", model_laws().values(), ids=model_laws())
    @given(model=models())
    def test_laws_of_models(law, model):
        law(ModelCase(model, "my-op", example_inputs=example_like(model, (2, 3, 9, 9))))
"""

from convsurgeon.testing._cases import Case, Op, accepts, cases, input_size, make_donor, sample_cases, specs
from convsurgeon.testing._model_law import ModelCase, ModelLaw
from convsurgeon.testing._models import check_model, model_laws
from convsurgeon.testing._networks import models
from convsurgeon.testing._op_law import EXPENSIVE, Law
from convsurgeon.testing._ops import check_op, laws

__all__ = [
    "EXPENSIVE",
    "Case",
    "Law",
    "ModelCase",
    "ModelLaw",
    "Op",
    "accepts",
    "cases",
    "check_model",
    "check_op",
    "input_size",
    "laws",
    "make_donor",
    "model_laws",
    "models",
    "sample_cases",
    "specs",
]
