package cli

import (
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

func TestUsageErrors(t *testing.T) {
	a := newAPI(t)
	for _, tc := range []struct {
		args string
		want string
	}{
		{"frob", `unknown command "frob": see isthmus --help`},
		{"prox", "did you mean proxy"},
		{"vm lst", "did you mean list: see isthmus vm --help"},
		{"proxy config frob reviews-1", `unknown command "frob": see isthmus proxy config --help`},
		{"proxy config routes", "accepts 1 arg(s), received 0: see isthmus proxy config routes --help"},
		{"proxy config route a b", "accepts 1 arg(s), received 2"},
		{"proxy status a b", "accepts at most 1 arg(s)"},
		{"vm list extra", "see isthmus vm list --help"},
		{"vm list --frob", "unknown flag: --frob: see isthmus vm list --help"},
		{"vm list -o xml", `--output is "xml": it is table, wide, json or yaml`},
		{"vm invite a -o xml", `--output is "xml"`},
		{"vm invite", "accepts 1 arg(s), received 0: see isthmus vm invite --help"},
		{"vm invite a b", "accepts 1 arg(s), received 2"},
		{"vm invite a --port web", `port "web": want PROTOCOL:NUMBER, as http:9080`},
		{"vm invite a --port http:0", "1 to 65535"},
		{"vm invite a --labels app", "must be formatted as key=value"},
		{"vm invite a --allow-address ten", `"ten" is neither an address nor a range`},
		{"vm invite a --expiry soon", "invalid duration"},
		{"vm invite a --expose", "--expose needs --labels app=NAME and --port"},
		{"vm invite a --expose --labels app=a", "--expose needs"},
		{"vm remove", "accepts 1 arg(s), received 0"},
		{"version now", "see isthmus version --help"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			a.run(strings.Fields(tc.args)...).failed(t, ExitUsage, tc.want)
		})
	}
	if len(a.created) > 0 {
		t.Errorf("created all the same: %v", a.created)
	}
}

func TestKubeconfig(t *testing.T) {
	a := newAPI(t)
	entries := "/apis/networking.istio.io/v1/namespaces/default/workloadentries"
	a.list(entries, "networking.istio.io/v1", "WorkloadEntry")
	a.list("/apis/isthmus.dev/v1alpha1/namespaces/default/jointokens", "isthmus.dev/v1alpha1", "JoinToken")
	t.Setenv("HOME", t.TempDir())
	t.Setenv("KUBECONFIG", "")

	t.Run("none", func(t *testing.T) {
		if _, err := os.Stat(standaloneKubeconfig); err == nil {
			t.Skip("a standalone isthmusd was on this host")
		}
		runCommand(t, "vm", "list").failed(t, 1, "no kubeconfig found: give --kubeconfig, or set KUBECONFIG as isthmusd prints it")
	})
	t.Run("KUBECONFIG of nothing", func(t *testing.T) {
		t.Setenv("KUBECONFIG", "/nonexistent/config")
		runCommand(t, "vm", "list").failed(t, 1, "no kubeconfig found in /nonexistent/config, as KUBECONFIG says", "give --kubeconfig")
	})
	t.Run("explicit path of nothing", func(t *testing.T) {
		runCommand(t, "vm", "list", "--kubeconfig", "/nonexistent/config").failed(t, 1, "stat /nonexistent/config: no such file", "give another by --kubeconfig")
	})
	t.Run("unknown context", func(t *testing.T) {
		a.run("vm", "list", "--context", "three").failed(t, 1, `context "three" does not exist`)
	})
	t.Run("explicit path wins", func(t *testing.T) {
		t.Setenv("KUBECONFIG", "/nonexistent/config")
		if r := a.run("vm", "list", "--context", "two"); r.code != 0 {
			t.Error(r.err)
		}
	})
	t.Run("KUBECONFIG, and the namespace of a context", func(t *testing.T) {
		t.Setenv("KUBECONFIG", a.kubeconfig)
		if r := runCommand(t, "vm", "list", "--context", "two"); r.code != 0 || r.err != "No machines found in namespace default.\n" {
			t.Errorf("%+v", r)
		}
	})
	t.Run("flag for the namespace wins", func(t *testing.T) {
		if r := a.run("vm", "list", "-n", "default"); r.code != 0 || r.err != "No machines found in namespace default.\n" {
			t.Errorf("%+v", r)
		}
	})
}

func TestUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := l.Addr().String()
	l.Close()
	a := newAPI(t)

	t.Run("Kubernetes API", func(t *testing.T) {
		down := writeKubeconfig(t, "https://"+nobody, certificate(a.isthmusd))
		for _, args := range [][]string{{"vm", "list"}, {"proxy", "status"}, {"vm", "invite", "a"}, {"vm", "remove", "a"}} {
			runCommand(t, append(args, "--kubeconfig", down)...).failed(t, 1, "connection refused", "no answer of the Kubernetes API https://"+nobody, "isthmusd --standalone")
		}
	})
	t.Run("isthmusd", func(t *testing.T) {
		a.run("proxy", "status", "--server", nobody).failed(t, 1, "connection refused", "is "+nobody+" reachable from here? else give --server")
	})
	t.Run("isthmusd was never here", func(t *testing.T) {
		empty := newAPI(t)
		clear(empty.objects)
		empty.run("proxy", "status").failed(t, 1, "isthmusd has not run on this cluster yet", "--context")
		empty.run("vm", "invite", "a").failed(t, 1, "isthmusd has not run on this cluster yet")
		if len(empty.created) > 0 {
			t.Errorf("created all the same: %v", empty.created)
		}
	})
	t.Run("isthmusd of another CA", func(t *testing.T) {
		other := newAPI(t)
		m := other.objects["/api/v1/namespaces/istio-system/configmaps/isthmus-server"].(map[string]any)
		m["data"].(map[string]any)["ca.pem"] = "none"
		other.run("proxy", "status").failed(t, 1, "ConfigMap istio-system/isthmus-server holds no CA certificate")
	})
}

func TestPermission(t *testing.T) {
	for _, tc := range []struct {
		args, path string
		code       int
		want       []string
	}{
		{"proxy status", readerToken, http.StatusForbidden, []string{"get a token of ServiceAccount istio-system/isthmus-reader", "no permission; ask for it"}},
		{"proxy status", "/api/v1/namespaces/istio-system/configmaps/isthmus-server", http.StatusForbidden, []string{"no permission; ask for it"}},
		{"proxy status", "/api/v1/namespaces/istio-system/configmaps/isthmus-server", http.StatusUnauthorized, []string{"does not accept the kubeconfig's credentials"}},
		{"vm list", "/apis/networking.istio.io/v1/namespaces/shop/workloadentries", http.StatusForbidden, []string{"no permission to list WorkloadEntries", "ask for it"}},
		{"vm list", "/apis/networking.istio.io/v1/namespaces/shop/workloadentries", http.StatusUnauthorized, []string{"does not accept the kubeconfig's credentials"}},
		{"vm list", "/apis/networking.istio.io/v1/namespaces/shop/workloadentries", http.StatusNotFound, []string{"does not know that kind of object", "isthmusd"}},
	} {
		t.Run(tc.args+" "+reasons[tc.code], func(t *testing.T) {
			a := newAPI(t)
			a.status[tc.path] = tc.code
			a.run(strings.Fields(tc.args)...).failed(t, 1, tc.want...)
		})
	}
}

func TestCompletion(t *testing.T) {
	a := newAPI(t)
	a.machines()
	a.proxies()
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if out := runCommand(t, "completion", shell).ok(t); !strings.Contains(out, "isthmus") {
			t.Errorf("%s: %q", shell, out)
		}
	}
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{[]string{"vm", ""}, []string{"invite", "list", "remove"}},
		{[]string{"vm", "list", "-o", ""}, outputs},
		{[]string{"vm", "remove", ""}, []string{"reviews-1", "reviews-2", "reviews-v2-frankfurt-12"}},
		{[]string{"proxy", "config", ""}, []string{"clusters", "endpoints", "listeners", "names", "routes", "workload"}},
		{[]string{"proxy", "config", "routes", ""}, []string{"reviews-1"}},
	} {
		r := runCommand(t, slices.Concat([]string{cobra.ShellCompNoDescRequestCmd, "--kubeconfig", a.kubeconfig}, tc.args)...)
		lines := strings.Split(strings.TrimSpace(r.out), "\n")
		if got := lines[:len(lines)-1]; r.code != 0 || !slices.Equal(got, tc.want) {
			t.Errorf("%q completes to %q, want %q\n%s", tc.args, got, tc.want, r.err)
		}
	}
}

func TestVersion(t *testing.T) {
	if out := runCommand(t, "version").ok(t); !strings.HasPrefix(out, "isthmus ") {
		t.Errorf("%q", out)
	}
	if out := runCommand(t, "version", "-o", "json").ok(t); !strings.Contains(out, `"version": "`) {
		t.Errorf("%q", out)
	}
}
