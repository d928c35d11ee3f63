from experiments import approximation, lab

lab.main(approximation)
