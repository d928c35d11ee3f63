from experiments import finite_duals, lab

lab.main(finite_duals)
