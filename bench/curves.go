package main

func curveRows() []row { return nil }
