"""Run in the environment of inference-sdk: asks a server for masks as its users do, and prints what came back."""

import json
import sys
import warnings

from inference_sdk import InferenceHTTPClient
from inference_sdk.http.errors import HTTPCallErrorError

url, api_key, image = sys.argv[1:]
warnings.simplefilter("ignore")
client = InferenceHTTPClient(api_url=url, api_key=api_key)
prompts = [
    {"points": [{"x": 100, "y": 120, "positive": True}, {"x": 9, "y": 9, "positive": False}]},
    {"box": {"x": 110, "y": 105, "width": 180, "height": 150}},
]
answers = {form: client.sam2_segment_image(image, prompts=prompts, mask_input_format=form) for form in ("rle", "json")}
try:
    client.sam2_segment_image(image, prompts=[{"points": [{"x": 9999, "y": 1, "positive": True}]}])
except HTTPCallErrorError as error:
    answers["refusal"] = [error.status_code, error.api_message]
print(json.dumps(answers))
