package badinput

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// testPermission asks as a user whom the API server knows and who may nothing, and
// as one whom it does not know.
func testPermission(t *testing.T, cp *controlPlane) {
	known, unknown := cp.userConfig(t, cp.userToken(t)), cp.userConfig(t, "nonsense")
	before := cp.machines(t)
	for _, tc := range []struct {
		args string
		want string
	}{
		{"vm list", "no permission to list WorkloadEntries"},
		{"vm invite intruder", "no permission"},
		{"vm remove vm-0", "no permission to list JoinTokens in namespace bad"},
		{"proxy status", "no permission"},
		{"proxy config routes vm-0", "no permission"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			args := append(strings.Fields(tc.args), "-n", namespace, "--kubeconfig")
			command{}.run(t, "isthmus", append(args, known)...).refused(t, tc.want, "ask for it", "system:serviceaccount:bad:nobody")
			command{}.run(t, "isthmus", append(args, unknown)...).refused(t, "does not accept the kubeconfig's credentials", "expired")
		})
	}
	if after := cp.machines(t); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("machines were %v and are %v", before, after)
	}
}

func (cp *controlPlane) userToken(t *testing.T) string {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", cp.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	accounts := kube.CoreV1().ServiceAccounts(namespace)
	if _, err := accounts.Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "nobody"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	token, err := accounts.CreateToken(t.Context(), "nobody", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return token.Status.Token
}

// userConfig is a kubeconfig as the administrator's, of another user.
func (cp *controlPlane) userConfig(t *testing.T, token string) string {
	t.Helper()
	config, err := clientcmd.LoadFromFile(cp.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	for name := range config.AuthInfos {
		config.AuthInfos[name] = &clientcmdapi.AuthInfo{Token: token}
	}
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*config, path); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
