package kubeapi

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestKilledWhileWriting kills the child in the middle of writes: it is started
// again on the same data and port, and nothing that was acknowledged is lost.
func TestKilledWhileWriting(t *testing.T) {
	t.Parallel()
	c := startChild(t, testOptions(t))
	client := clientOf(t, c.Config())
	var acknowledged sync.Map
	for round := range 2 {
		killed := c.PID()
		writing, stop := context.WithCancel(t.Context())
		var writers sync.WaitGroup
		var count atomic.Int64
		for w := range 4 {
			writers.Go(func() {
				for i := 0; writing.Err() == nil; i++ {
					name := fmt.Sprintf("round-%d-%d-%d", round, w, i)
					if putConfigMap(writing, client, name) == nil {
						acknowledged.Store(name, true)
						count.Add(1)
					}
				}
			})
		}
		eventually(t, func() error {
			if n := count.Load(); n < 50 {
				return fmt.Errorf("only %d writes acknowledged", n)
			}
			return nil
		})
		if err := syscall.Kill(killed, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() error {
			if err := c.Health(t.Context()); err == nil && c.PID() == killed {
				return errors.New("health does not show the end")
			}
			return nil
		})
		stop()
		writers.Wait()
		eventually(t, func() error { return c.Health(t.Context()) })
		if c.PID() == killed {
			t.Fatal("healthy under the killed process")
		}
	}
	list, err := client.CoreV1().ConfigMaps("default").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	have, total := namesOf(list.Items), 0
	acknowledged.Range(func(name, _ any) bool {
		total++
		if !have[name.(string)] {
			t.Errorf("%s was acknowledged and is lost", name)
		}
		return true
	})
	t.Logf("%d acknowledged writes are all there", total)
}

// beParent starts an embedded API, says so, and waits to be killed.
func beParent(dir string) {
	c, err := Start(context.Background(), Options{DataDir: dir})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println("child", c.PID(), c.Address())
	select {}
}

// TestParentDies kills the parent: the child ends by itself, leaves the data
// directory free, and the next one serves at the same address.
func TestParentDies(t *testing.T) {
	t.Parallel()
	o := testOptions(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	parent := exec.CommandContext(t.Context(), self)
	parent.Env = append(os.Environ(), parentVariable+"="+o.DataDir)
	stdout, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	fields := strings.Fields(line)
	if err != nil || len(fields) != 3 || fields[0] != "child" {
		t.Fatalf("the parent said %q: %v", line, err)
	}
	pid, err := strconv.Atoi(fields[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait() // it was killed
	eventually(t, func() error {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) && !zombie(pid) {
			return fmt.Errorf("child %d outlives its parent: %w", pid, err)
		}
		return nil
	})
	if c := startChild(t, o); c.Address() != fields[2] {
		t.Errorf("serves at %s, before at %s", c.Address(), fields[2])
	}
}

// zombie says whether a process has ended and nobody has asked how: of orphans that
// depends on the container's first process.
func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && strings.Contains(string(b), ") Z ")
}

func TestStartRefused(t *testing.T) {
	t.Parallel()
	o := testOptions(t)
	c := startChild(t, o)
	_, port, err := net.SplitHostPort(strings.TrimPrefix(c.Address(), "https://"))
	if err != nil {
		t.Fatal(err)
	}
	taken, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := testOptions(t)
	elsewhere.Port = taken
	tests := map[string]struct {
		options Options
		code    Code
		says    []string
	}{
		"data directory in use": {o, CodeDataDirInUse, []string{o.DataDir, "process " + strconv.Itoa(c.PID()), filepath.Join(o.DataDir, "lock"), "--data-dir"}},
		"port in use":           {elsewhere, CodePortInUse, []string{port, "--port"}},
		"flag refused": {func() Options { o := testOptions(t); o.APIServerFlags = []string{"--no-such-flag=1"}; return o }(),
			"kube-apiserver", []string{"unknown flag: --no-such-flag"}},
		"path too long for sockets": {func() Options { o := testOptions(t); o.DataDir += strings.Repeat("/long", 30); return o }(),
			"data-dir", []string{"too long", "shorter --data-dir"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			second, err := Start(t.Context(), tt.options)
			if err == nil {
				second.Stop()
				t.Fatal("it started")
			}
			fatal := (*FatalError)(nil)
			if !errors.As(err, &fatal) || fatal.Code != tt.code {
				t.Fatalf("error %v with code %v, want %s", err, fatal, tt.code)
			}
			for _, s := range tt.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("error %q does not say %q", err, s)
				}
			}
		})
	}
	if err := c.Health(t.Context()); err != nil {
		t.Errorf("the first one suffered: %v", err)
	}
}

func TestStopEndsTheChild(t *testing.T) {
	t.Parallel()
	o := testOptions(t)
	c := startChild(t, o)
	pid := c.PID()
	c.Stop()
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("process %d is still there: %v", pid, err)
	}
	if err := c.Health(t.Context()); err == nil {
		t.Error("healthy after its stop")
	}
}

// TestExternalEtcd runs a second server on the store of a first one, with its keys.
func TestExternalEtcd(t *testing.T) {
	t.Parallel()
	first := testOptions(t)
	a := startChild(t, first)
	second := testOptions(t)
	second.Etcd.Servers = []string{"unix://" + filepath.Join(first.DataDir, "etcd.sock")}
	pki := filepath.Join(second.DataDir, "pki")
	if err := os.MkdirAll(pki, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ca.crt", "ca.key", "sa.key"} {
		b, err := os.ReadFile(filepath.Join(first.DataDir, "pki", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(pki, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b := startChild(t, second)
	atA, atB := clientOf(t, a.Config()), clientOf(t, b.Config())
	createNamespace(t, atA, "shared")
	if _, err := atB.CoreV1().Namespaces().Get(t.Context(), "shared", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	if got := reviewToken(t, atB, requestToken(t, atA, "shared", "istio-ca"), "istio-ca"); !got.Authenticated {
		t.Errorf("a token of the first server at the second: %+v", got)
	}
	if _, err := os.Stat(filepath.Join(second.DataDir, "etcd")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the second server has an etcd of its own: %v", err)
	}
}
