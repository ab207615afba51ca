"""A Hugging Face classifier with lengths of its own, in 8 bits.   python compress.py"""

import model

import featherweight as fw

classifier, tokenizer = model.trained()
task = fw.task.texts("texts.csv", "library", tokenizer=tokenizer, length=128, pad="longest")
inputs = dict(tokenizer(["a short text", "another one, which is longer"], padding=True, return_tensors="pt"))
network = fw.capture(classifier, inputs, outputs=("logits",))
result = fw.compress(network, task, [fw.quantize.Quantize(smooth=0.5)], out="out")
print(result.trail[0].score, "->", result.trail[-1].score, "; out/report.html")
