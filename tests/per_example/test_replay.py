"""Models that torch.func does not take as they are."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import CASES
from tests.oracles.per_example import relative_error


@pytest.mark.parametrize("name", ["mlp", "dropout_where_the_whole_model_is_the_unit", "parameter_at_the_root"])
def test_data_parallel_on_one_device_gives_the_rows_of_its_module(name):
    found = []
    for wrap in (lambda model: model, nn.DataParallel):
        case = CASES[name]()
        model = wrap(case.model)
        optimizer = vlearn.IVON(model, lr=0.1, ess=20, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        case.loss(case.call(model), case.target).backward()
        live = optimizer.sensitivities(deviation=True)
        optimizer.step()
        table = vlearn.sweep(model, optimizer.posterior(), [(case.x, case.target)], case.loss, progress=False)
        found.append((live.self_influence, live.deviation, table.self_influence, table.deviation))
    for plain, wrapped in zip(*found, strict=True):
        assert relative_error(wrapped, plain) < 1e-12


@pytest.mark.parametrize("name", ["channels_last", "channels_last_in_three_dimensions"])
@pytest.mark.parametrize("make", [vlearn.VON, vlearn.VOGN, vlearn.FullVON], ids=lambda make: make.__name__)
def test_the_memory_format_makes_no_difference_to_a_step(name, make):
    found = []
    for contiguous in (False, True):
        case = CASES[name]()
        if contiguous:
            case.model = copy.deepcopy(case.model)
            for p in case.model.parameters():
                p.data = p.data.contiguous()
        optimizer = make(case.model, lr=0.01, ess=20, generator=torch.Generator().manual_seed(1))
        for _ in range(2):
            optimizer.zero_grad()
            x = case.x.contiguous() if contiguous else case.x
            F.cross_entropy(case.model(x), case.target).backward()
            optimizer.step()
        found.append([p.detach() for p in case.model.parameters()])
    for plain, other in zip(*found, strict=True):
        assert relative_error(other, plain) < 1e-10
