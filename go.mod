module github.com/dmsnap/dmsnap

go 1.26.0
