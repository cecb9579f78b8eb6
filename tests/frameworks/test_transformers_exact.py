"""Hugging Face's own models, small: dicts in, dataclasses out, and every layer but a ViT's embeddings by a rule."""

import pytest
import torch
import torch.nn.functional as F

import vlearn
from tests.capture.test_trace import recorded
from tests.oracles.networks import Case
from tests.oracles.per_example import flat, moving, per_example, relative_error

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
TOKENS = {"vocab_size": 7, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}


def next_token(output, target, reduction="mean"):
    return F.cross_entropy(output.transpose(1, 2), target, reduction=reduction)


def gpt2():
    sizes = {"n_positions": 6, "n_embd": 4, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=7, bos_token_id=1, eos_token_id=2, **sizes)
    return transformers.GPT2LMHeadModel(config)


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **TOKENS, num_labels=3))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **TOKENS, num_key_value_heads=1))


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1, num_labels=3)
    return transformers.ViTForImageClassification(config)


def case_of(build, examples):
    torch.manual_seed(0)
    model = build().double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    tokens, classes = torch.randint(1, 7, (examples, 5)), torch.arange(examples) % 3
    if build is vit:
        return Case(model, {"pixel_values": torch.randn(examples, 1, 8, 8).double()}, classes)
    if build is bert:
        return Case(model, {"input_ids": tokens, "attention_mask": (tokens > 2).long()}, classes)
    return Case(model, {"input_ids": tokens}, tokens.roll(-1, 1), next_token)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "examples", "without_a_rule"),
    [(gpt2, 3, []), (gpt2, 5, []), (bert, 5, []), (llama, 3, []), (vit, 3, ["vit.embeddings"])],
    ids=["GPT-2", "GPT-2 with as many tokens as examples", "BERT", "Llama", "ViT"],
)
def test_sensitivities_of_a_whole_model_equal_the_oracle(build, examples, without_a_rule):
    case = case_of(build, examples)
    trace, _ = recorded(case)
    assert [call.path for call in trace.layer_calls if call.rule is None and call.parameters] == without_a_rule
    posterior = vlearn.IVON(case.model, lr=0.1, ess=20).posterior()
    table = vlearn.sweep(
        case.model, posterior, [(case.x, case.target)], case.loss, "exact", output="logits", progress=False
    )
    truth = per_example(
        case.model,
        lambda model: case.call(model).logits,
        lambda logits: case.loss(logits, case.target, reduction="none").reshape(examples, -1).mean(1),
    )
    covariance = torch.diag(flat({name: posterior.variance[name] for name in moving(case.model)}))
    tolerance = 1e-6 if build is llama else 1e-10  # its norms work in float32 whatever they are given
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < tolerance
    assert relative_error(table.deviation.flatten(1), truth.deviation(covariance)) < tolerance
    assert relative_error(table.leverage, truth.leverage(covariance)) < tolerance
