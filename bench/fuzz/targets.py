"""All targets; a thousand inputs are shared out so that each takes some part of the time."""

from bench.fuzz import images, prompts, records, settings
from bench.fuzz.target import Target

TARGETS = (
    Target("images", images.make, images.check, share=30),
    Target("image headers", images.make, images.check_headers, share=200),
    Target("PredictMasks", prompts.maker(prompts.PREDICT), prompts.check_predict, share=150),
    Target("GenerateMasks", prompts.maker(prompts.GENERATE), prompts.check_generate, share=200),
    Target("encoder requests", prompts.make_encoder_request, prompts.check_encoder_request, share=60),
    Target("records", records.make, records.check, share=100),
    Target("record headers", records.make_header, records.check_header, share=250),
    Target("settings", settings.make, settings.check, share=10),
)
BY_NAME = {target.name: target for target in TARGETS}
