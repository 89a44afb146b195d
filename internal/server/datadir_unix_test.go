//go:build unix

package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// holderOf names, in the environment, a data directory that the process is to hold
// until its standard input closes.
const holderOf = "TEST_HOLD_DATA_DIR"

func TestMain(m *testing.M) {
	if file := os.Getenv(isthmusdOf); file != "" {
		os.Exit(runIsthmusd(file))
	}
	if path := os.Getenv(holderOf); path != "" {
		if _, err := holdDataDir(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println("held")
		_, _ = os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestDataDirIsHeldByOne(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	first, err := holdDataDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	held := func() *heldDataDir {
		t.Helper()
		_, err := holdDataDir(dir)
		h, ok := errors.AsType[*heldDataDir](err)
		if !ok || !strings.Contains(err.Error(), fmt.Sprintf("process %d) serves from --data-dir %s: end it", os.Getpid(), dir)) {
			t.Fatalf("a second one gets %v", err)
		}
		return h
	}
	if held().ending {
		t.Error("the first one is said to end")
	}
	if err := first.end(); err != nil {
		t.Fatal(err)
	}
	if !held().ending {
		t.Error("the first one ends, which is not said")
	}
	if err := first.release(); err != nil {
		t.Fatal(err)
	}
	again, err := holdDataDir(dir)
	if err != nil {
		t.Fatalf("after the first has ended: %v", err)
	}
	if err := again.release(); err != nil {
		t.Fatal(err)
	}
	if _, err := holdDataDir("/proc/none"); err == nil || !strings.Contains(err.Error(), "give one that this user may write") {
		t.Errorf("where nobody may write: %v", err)
	}
}

// TestDataDirOfADeadProcess: who is killed leaves nothing behind to wait for.
func TestDataDirOfADeadProcess(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holderOf+"="+dir)
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 4)); err != nil {
		t.Fatal(err)
	}
	if _, err := holdDataDir(dir); err == nil {
		t.Error("another process holds it, which is not noticed")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	d, err := holdDataDir(dir)
	if err != nil {
		t.Fatalf("its owner was killed: %v", err)
	}
	if err := d.release(); err != nil {
		t.Error(err)
	}
}

// TestHomeWaitsForOneThatEnds, and for no other.
func TestHomeWaitsForOneThatEnds(t *testing.T) {
	s := &server{Config: Config{DataDir: filepath.Join(t.TempDir(), "data")}, log: slog.New(slog.DiscardHandler)}
	ctx, stop := context.WithCancel(t.Context())
	release, err := s.home(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.home(t.Context()); err == nil {
		t.Fatal("two hold it")
	}
	stop() // said in the directory some time later
	eventually(t, "it is said that the first one ends", func() bool {
		_, err := holdDataDir(s.DataDir)
		held, ok := errors.AsType[*heldDataDir](err)
		return ok && held.ending
	})
	second := make(chan error, 1)
	go func() {
		ctx, stop := context.WithCancel(t.Context())
		release, err := s.home(ctx)
		stop()
		if err == nil {
			release()
		}
		second <- err
	}()
	release()
	if err := <-second; err != nil {
		t.Error(err)
	}
}
