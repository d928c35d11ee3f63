from experiments import lab, softmax_regression

lab.main(softmax_regression)
