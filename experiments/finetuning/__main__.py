from experiments import finetuning, lab

lab.main(finetuning)
