"""Make tests/fixtures/preferences/trl.npz: TRL's preference losses, so that ppo.py can be held against them.

    pip download --no-deps trl==0.11.4 && python tests/make_preference_fixtures.py trl-0.11.4-py3-none-any.whl

TRL 0.11.4 is the last release whose trainers have the losses as functions of log-probabilities. Their methods run
by themselves, without the rest of TRL: dpo_loss of DPOTrainer ("sigmoid" with and without label smoothing, "ipo"),
cpo_loss of CPOTrainer ("simpo"), odds_ratio_loss of ORPOTrainer, kto_loss of KTOTrainer. Inputs are random, in fp64:

    chosen  rejected  ref_chosen  ref_rejected  chosen_length  rejected_length  kl  ref_kl
    dpo  cdpo  ipo  simpo  odds  kto_good  kto_bad  kl_mean: what the methods return
"""
import ast
import pathlib
import sys
import types
import zipfile

import numpy as np
import torch
import torch.nn.functional as F

OUT = pathlib.Path(__file__).parent / "fixtures" / "preferences" / "trl.npz"


def definition(wheel, file, name):
    """The syntax tree of a function, a method or CLASS.METHOD of trl/FILE.py in a wheel."""
    found = ast.parse(zipfile.ZipFile(wheel).read(f"trl/{file}.py"))
    for part in name.split("."):
        [found] = [node for node in ast.walk(found)
                   if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == part]
    return found


def method(wheel, file, name, **names):
    """A function, or a method of a trainer as a function (self, ...); annotations are dropped, they name types of
    TRL. names: what else its text names."""
    node = definition(wheel, file, name)
    node.returns = None
    for arg in node.args.args:
        arg.annotation = None
    names |= {"torch": torch, "F": F, "FDivergenceType": types.SimpleNamespace(
        ALPHA_DIVERGENCE=types.SimpleNamespace(value="alpha"), JS_DIVERGENCE=types.SimpleNamespace(value="js"))}
    exec(ast.unparse(node), names)
    return names[node.name]


def main(wheel):
    g = torch.Generator().manual_seed(0)
    lengths = [torch.randint(1, 9, (16,), generator=g) for _ in range(2)]
    logps = [-(n * (0.2 + 2 * torch.rand(16, generator=g, dtype=torch.float64))) for n in (*lengths, *lengths)]
    kl, ref_kl = -20 * torch.rand(2, 16, generator=g, dtype=torch.float64)
    data = dict(zip(("chosen", "rejected", "ref_chosen", "ref_rejected"), logps), chosen_length=lengths[0],
                rejected_length=lengths[1], kl=kl + 2, ref_kl=ref_kl)
    c, r, rc, rr = logps
    accelerator = types.SimpleNamespace(device="cpu", gather=lambda x: x)

    def trainer(**settings):
        return types.SimpleNamespace(accelerator=accelerator, reference_free=False, f_divergence_type=None,
                                     calculate_KL=True, **settings)
    dpo = method(wheel, "trainer/dpo_trainer", "dpo_loss")
    data["dpo"] = dpo(trainer(loss_type="sigmoid", beta=0.3, label_smoothing=0.0), c, r, rc, rr)[0]
    data["cdpo"] = dpo(trainer(loss_type="sigmoid", beta=0.3, label_smoothing=0.2), c, r, rc, rr)[0]
    data["ipo"] = dpo(trainer(loss_type="ipo", beta=0.3), c, r, rc, rr)[0]
    m = c / lengths[0], r / lengths[1]
    data["simpo"] = method(wheel, "trainer/cpo_trainer", "cpo_loss")(
        trainer(loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=0.0), *m)[0]
    data["odds"] = method(wheel, "trainer/orpo_trainer", "odds_ratio_loss")(trainer(beta=0.25), *m)[0]
    both, _, _, mean = method(wheel, "trainer/kto_trainer", "kto_loss")(
        trainer(loss_type="kto", beta=0.3, desirable_weight=1.25, undesirable_weight=0.75), c, r, kl + 2, rc, rr, ref_kl)
    data["kto_good"], data["kto_bad"] = both.chunk(2)
    data["kl_mean"] = mean
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(OUT, **{name: x.numpy() for name, x in data.items()})


if __name__ == "__main__":
    main(sys.argv[1])
