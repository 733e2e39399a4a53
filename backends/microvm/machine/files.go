package machine

import (
	"errors"
	"fmt"
	"os"
)

// lent are the files that a VMM boots from, open: kernel, first file system, disk. It gets there by no path, and reads them by its group.
func lent(c Config) (list []*os.File, err error) {
	for _, path := range []string{c.Kernel, c.Initrd, c.Disk} {
		f, err := os.Open(path)
		if err == nil {
			list = append(list, f)
			if c.User != 0 {
				err = errors.Join(f.Chown(-1, Group), f.Chmod(0o640))
			}
		}
		if err != nil {
			return nil, errors.Join(err, closed(list))
		}
	}
	return list, nil
}

func closed(list []*os.File) (err error) {
	for _, f := range list {
		err = errors.Join(err, f.Close())
	}
	return err
}

// byFD is the path of a file that a program was given, for the program.
func byFD(fd int) string { return fmt.Sprint("/proc/self/fd/", fd) }
