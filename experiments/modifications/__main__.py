from experiments import lab, modifications

lab.main(modifications)
