from experiments import generalization, lab

lab.main(generalization)
