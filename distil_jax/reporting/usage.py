"""How an exported model is used: the section of a model card that a reader copies."""

from __future__ import annotations

from distil_jax.runtime.run_folder import Model

_FILL_MASK = """\
from transformers import pipeline

fill_mask = pipeline("fill-mask", model=".")
print(fill_mask(f"The {fill_mask.tokenizer.mask_token} is in the house."))
"""
_ENCODE = """\
from transformers import pipeline

encode = pipeline("feature-extraction", model=".")
print(encode("The cat is in the house.", return_tensors=True).shape)
"""
_TASKS = {
    "sequence": """\
from transformers import pipeline

classify = pipeline("text-classification", model=".")
print(classify("The cat is in the house.", truncation=True))
""",
    "pairs": """\
from transformers import pipeline

classify = pipeline("text-classification", model=".")
print(classify({"text": "The cat is in the house.", "text_pair": "The house has a cat."}, truncation=True))
""",
    "tokens": """\
from transformers import pipeline

tag = pipeline("token-classification", model=".", aggregation_strategy="simple")
print(tag("The cat is in the house."))
""",
    "spans": """\
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForQuestionAnswering.from_pretrained(".")
inputs = tokenizer("Where is the cat?", "The cat is in the house.", truncation="only_second", return_tensors="pt")
answer = model(**inputs)
start, end = int(answer.start_logits.argmax()), int(answer.end_logits.argmax())
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))
""",
}


def usage(model: Model) -> list[str]:
    """The lines of a section with a program that works in the model's folder."""
    plain = _FILL_MASK if model.config.mlm_head else _ENCODE
    kind = None if model.head is None else model.head.kind
    if kind == "sequence" and model.run is not None and len(model.run_config.task.text) > 1:
        kind = "pairs"
    program = plain if kind is None else _TASKS[kind]
    return [
        "## Use",
        "",
        "In this folder; elsewhere, put its path or its name on the hub in place of the dot:",
        "",
        f"```python\n{program}```",
        "",
        "It is an ordinary model of `transformers`: fine-tune it, convert it, or upload it from this folder "
        "(`hf upload YOUR_NAME/MODEL .`) like any other.",
    ]
