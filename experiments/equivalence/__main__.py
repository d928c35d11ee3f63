from experiments import equivalence, lab

lab.main(equivalence)
