package main

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// packedDisk is a disk that a real lvm2 made, with the linear volume vg/plain of 4 MiB.
const (
	packedDisk = "source/lvm/testdata/single/disk0.gz"
	volumeSize = 4 << 20
)

// volumeRow reads a logical volume by its address; the other column reads a raw image with the same content.
func volumeRow(name string, j job, bytes bool) row {
	r := row{name: name, unit: "IOPS", columns: []string{ours, ourRaw},
		bars: []bar{{text: "≥ 0.95 × own raw export", least: 0.95, peers: []string{ourRaw}}}}
	if bytes {
		r.unit = "MiB/s"
	}
	r.run = func(ctx context.Context, l *lab, c contender, round int) (s sample, err error) {
		volume, image, err := l.volume(ctx)
		if err != nil {
			return s, err
		}
		if c.key == ours {
			image = volume
		}
		t, err := l.open(ctx, find(ourRaw), "", image)
		if err != nil {
			return s, err
		}
		defer func() { err = errors.Join(err, t.close()) }()
		if c.key == ours { // the export has the name of the volume
			t.uri = t.server.uri("plain")
		}
		j := j
		j.size, j.seed = volumeSize, 100+round
		err = t.costs(&s, func() (int64, error) { return l.fioSample(ctx, j, t, bytes, &s) })
		return s, err
	}
	return r
}

// volume returns the address of a logical volume, and an image with its content. They are made once.
func (l *lab) volume(ctx context.Context) (volume, image string, err error) {
	disk := l.path("volume.disk")
	volume, image = disk+"#vg/plain", l.path("volume.img")
	if _, err := os.Stat(image); err == nil {
		return volume, image, nil
	}
	if err := unpackDisk(disk); err != nil {
		return "", "", err
	}
	defer settle()
	return volume, image, command(ctx, l.binary, "export", volume, image)
}

// unpackDisk writes the disk to path.
func unpackDisk(path string) (err error) {
	packed, err := os.Open(packedDisk)
	if err != nil {
		return fmt.Errorf("%w (run this in the folder of the module)", err)
	}
	defer packed.Close()
	from, err := gzip.NewReader(packed)
	if err != nil {
		return err
	}
	to, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	_, err = io.Copy(to, from)
	return err
}
