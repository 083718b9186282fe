"""Bad objectives, and samplers that an objective does not have: rows of `bad_inputs.py`."""

from bad_rows import Bad, train

OBJECTIVES = [
    Bad(
        train("objective.kind=flwo"), r"unknown objective.kind 'flwo' \(did you mean 'flow'\?\); choices: ddpm, v, flow"
    ),
    Bad(train("objective.times=logit_normal"), "says nothing to objective.kind=ddpm.*choose objective.kind=flow"),
    Bad(train("objective.kind=flow", "objective.schedule=cosine"), "says nothing to .*=flow.*choose .*=ddpm or v"),
    Bad(train("objective.kind=flow", "objective.times=normal"), "unknown objective.times 'normal'.*logit_normal"),
    Bad(train("objective.kind=flow", "sample.method=ancestral"), "does not have; choices: ddim, euler, heun, dpmpp_2m"),
    Bad(train("recipe=dit", "sample.guidance_channels=1", "objective.kind=flow"), "ancestral draws from a posterior"),
    Bad(train("objective.kind=flow", "sample.timesteps=ddim"), "objective.kind=flow has none; choices: even"),
    Bad(["cost", "dit_nano", "objective.kind=flwo"], "unknown objective.kind 'flwo'"),
    Bad(["cost", "dit_nano", "objective.knid=v"], "unknown key in objective 'knid'"),
    Bad(["bench", "dit_nano", "objective.kind=v", "objective.times=logit_normal"], "says nothing to objective.kind=v"),
    Bad(train("objective.schedule=cosin"), r"unknown objective.schedule 'cosin' \(did you mean 'cosine'\?\)"),
    Bad(train("sample.method=euler"), "euler is for straight paths.*choices: ancestral, ddim, heun, dpmpp_2m"),
    Bad(train("sample.method=eular"), r"unknown sample\.method 'eular' \(did you mean 'euler'\?\)"),
    Bad(["sample", "{run}", "sample.method=euler"], "euler is for straight paths.*choices: ancestral, ddim, heun"),
]
