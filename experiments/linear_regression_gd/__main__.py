from experiments import lab, linear_regression_gd

lab.main(linear_regression_gd)
