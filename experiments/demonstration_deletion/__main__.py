from experiments import demonstration_deletion, lab

lab.main(demonstration_deletion)
