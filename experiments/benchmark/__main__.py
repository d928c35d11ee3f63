from experiments import benchmark, lab

lab.main(benchmark)
