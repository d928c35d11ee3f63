from experiments import accounts, lab

lab.main(accounts)
