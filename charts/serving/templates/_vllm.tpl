{{- define "serving.vllmArgs" -}}
- --model
- {{ include "serving.modelDir" . | quote }}
- --served-model-name
- {{ include "serving.servedName" . | quote }}
- --host
- {{ .Values.listenAddress | quote }}
- --port
- "8000"
- --dtype
- {{ include "serving.dtype" . }}
- --kv-cache-dtype
- {{ .Values.vllm.kvCacheDtype }}
- --tensor-parallel-size
- {{ .Values.vllm.tensorParallelSize | int | quote }}
{{- with .Values.vllm.maxModelLen }}
- --max-model-len
- {{ . | int64 | quote }}
{{- end }}
{{- if gt (int .Values.gpu.count) 0 }}
- --gpu-memory-utilization
- {{ include "serving.utilization" . | quote }}
{{- end }}
{{- with .Values.vllm.maxNumSeqs }}
- --max-num-seqs
- {{ . | int64 | quote }}
{{- end }}
{{- with include "serving.chunk" . }}
- --max-num-batched-tokens
- {{ . | int64 | quote }}
{{- end }}
{{- if .Values.vllm.enforceEager }}
- --enforce-eager
{{- end }}
{{- with .Values.vllm.compilationConfig }}
- --compilation-config
- {{ toJson . | quote }}
{{- end }}
{{- if and (include "serving.routed" .) (eq .Values.router.policy "cache_aware") }}
# Pods tokenize prompts for the router (/v1/completions/render), which compares the tokens of prefixes.
- --enable-scale-out
{{- end }}
{{- include "serving.offloadArgs" . }}
{{- if .Values.adapters.enabled }}
- --enable-lora
- --max-lora-rank
- {{ .Values.adapters.maxRank | int | quote }}
- --max-loras
- {{ .Values.adapters.maxActive | int | quote }}
- --max-cpu-loras
- {{ .Values.adapters.maxLoaded | int | quote }}
{{- end }}
{{- range .Values.vllm.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- if .Values.tls.enabled }}
- --ssl-certfile
- /etc/ictx/tls/tls.crt
- --ssl-keyfile
- /etc/ictx/tls/tls.key
{{- end }}
# The last middleware is the outermost: it sees every request first.
- --middleware
- ictx.serve.gate.Gate
{{- end }}

{{- define "serving.probe" -}}
httpGet: {path: /health, port: {{ include "serving.scheme" . }}, scheme: {{ include "serving.scheme" . | upper }}}
{{- end }}

{{- define "serving.vllmContainer" -}}
image: {{ include "serving.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [python, -m, vllm.entrypoints.openai.api_server]
args:
  {{- include "serving.vllmArgs" . | nindent 2 }}
env:
  {{- include "serving.baseEnv" . | nindent 2 }}
  # vLLM's own check (VLLM_API_KEY) covers only a part of the API, and reads the key once.
  - name: ICTX_API_KEYS
    value: /etc/ictx/keys
  - name: ICTX_METRICS_PORT
    value: "9100"
  # Traffic between vLLM's processes is neither encrypted nor authenticated: keep it on the loopback address of the pod.
  - name: VLLM_HOST_IP
    value: 127.0.0.1
  - name: GLOO_SOCKET_IFNAME
    value: lo
  - name: NCCL_SOCKET_IFNAME
    value: lo
  - name: ICTX_VLLM_ATTENTION
    value: {{ .Values.vllm.attention }}
  # The model is on the volume: no downloads, no usage reports.
  - name: HF_HUB_OFFLINE
    value: "1"
  - name: VLLM_NO_USAGE_STATS
    value: "1"
  {{- if .Values.vllm.enforceEager }}
  # --enforce-eager covers the model only. vLLM also compiles functions at their first use, such as for log probabilities:
  # in an image without a compiler, such a request would end the engine.
  - name: TORCH_COMPILE_DISABLE
    value: "1"
  {{- end }}
  # Longer than proxies keep idle connections (ingress-nginx and Amazon's 60 s, Traefik 90 s): after vLLM's own 5 s, a proxy may
  # send a request into a connection that is being closed.
  - name: VLLM_HTTP_TIMEOUT_KEEP_ALIVE
    value: "120"
  # The root file system is read-only: compiled kernels and caches go to one volume.
  - name: XDG_CACHE_HOME
    value: /cache
  - name: VLLM_CACHE_ROOT
    value: /cache/vllm
  - name: HF_HOME
    value: /cache/huggingface
  - name: TRITON_CACHE_DIR
    value: /cache/triton
  - name: TORCHINDUCTOR_CACHE_DIR
    value: /cache/inductor
  {{- if .Values.adapters.enabled }}
  # vLLM warns that clients could load adapters: the gate closes these paths to them.
  - name: VLLM_ALLOW_RUNTIME_LORA_UPDATING
    value: "1"
  - name: ICTX_ADMIN
    value: /run/ictx
  {{- end }}
  {{- with .Values.vllm.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.vllm.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  - name: {{ include "serving.scheme" . }}
    containerPort: 8000
    protocol: TCP
  - name: metrics
    containerPort: 9100
    protocol: TCP
securityContext:
  {{- include "serving.containerSecurityContext" . | nindent 2 }}
{{- $resources := deepCopy .Values.resources }}
{{- if gt (int .Values.gpu.count) 0 }}
{{- $limits := merge (dict .Values.gpu.resourceName (.Values.gpu.count | int)) (get $resources "limits" | default dict) }}
{{- $_ := set $resources "limits" $limits }}
{{- end }}
resources:
  {{- toYaml $resources | nindent 2 }}
startupProbe:
  {{- include "serving.probe" . | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ mul 12 (include "serving.startupMinutes" . | int) }}
readinessProbe:
  {{- include "serving.probe" . | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
# High threshold: during a long prefill a server may respond late, and a restart would lose its requests.
livenessProbe:
  {{- include "serving.probe" . | nindent 2 }}
  periodSeconds: 15
  timeoutSeconds: 10
  failureThreshold: 8
lifecycle:
  preStop:
    exec:
      command:
        - python
        - -c
        - |
          {{- .Files.Get "files/drain.py" | trim | nindent 10 }}
        - {{ .Values.drain.delaySeconds | int | quote }}
        - {{ .Values.drain.timeoutSeconds | int | quote }}
        - http://127.0.0.1:9100/metrics
        - vllm:num_requests_running
        - vllm:num_requests_waiting
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  - name: keys
    mountPath: /etc/ictx/keys
    readOnly: true
  {{- if .Values.tls.enabled }}
  - name: tls
    mountPath: /etc/ictx/tls
    readOnly: true
  {{- end }}
  - name: models
    mountPath: /models
    readOnly: true
  - name: shm
    mountPath: /dev/shm
  - name: cache
    mountPath: /cache
  - name: tmp
    mountPath: /tmp
  {{- if .Values.kvOffload.diskClaim }}
  - name: kv
    mountPath: /kv
  {{- end }}
  {{- if .Values.adapters.enabled }}
  - name: adapters
    mountPath: /adapters
    readOnly: true
  - name: adapters-state
    mountPath: /run/ictx
    readOnly: true
  {{- end }}
  {{- with include "serving.extra" (list . "extraVolumeMounts") }}
  {{- . | nindent 2 }}
  {{- end }}
{{- end }}
