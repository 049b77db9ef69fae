"""Classes of models: exact, or refused in one sentence; what the page says of them is what was found."""

import json
import os

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from nb_utils.record import tables
from workflow import sweep_classes

TABLE = json.loads(sweep_classes.TABLE.read_text())
ALL = pytest.mark.skipif(not os.environ.get("BOOK_TEST_CLASSES"), reason="half an hour: set BOOK_TEST_CLASSES=1")


@pytest.mark.parametrize("model_type", sweep_classes.FAMILIES)
def test_a_family_is_as_the_table_says(model_type):
    verdict, why = sweep_classes.judge(model_type)
    assert verdict == TABLE["classes"][model_type]["verdict"], why
    if verdict == "refused":
        assert "\n" not in why and why.endswith(".") and NAMES[model_type] in why


@ALL
@pytest.mark.skipif(transformers.__version__ != TABLE["transformers"], reason="the table is of another transformers")
@pytest.mark.parametrize("model_type", sorted(NAMES))
def test_every_class_is_as_the_table_says(model_type):
    verdict, why = sweep_classes.alone(model_type)
    assert verdict == TABLE["classes"][model_type]["verdict"], why


def test_no_class_is_silently_wrong_and_every_refusal_is_a_sentence():
    for model_type, found in TABLE["classes"].items():
        assert found["verdict"] in ("exact", "refused", "untested"), model_type
        if found["verdict"] == "refused":
            assert "\n" not in found["why"] and found["why"].endswith("."), model_type


def test_the_page_shows_the_table():
    page = (tables.ROOT / "book/reproduce.md").read_text()
    assert sweep_classes.rendered(TABLE) in page, "run python -m workflow.sweep_classes --page"
